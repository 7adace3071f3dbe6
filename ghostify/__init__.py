"""ghostify turns a trained CNN into a Ghost network.

```python
small  = ghostify.convert(model, ratio=2, example_inputs=x, calibration=images)
run    = ghostify.distill(small, teacher=model, data=train, val=val, epochs=30)
report = ghostify.compare(model, small, example_inputs=x, data=test)
ghostify.save(small, "small/")
ghostify.export_onnx(small, "small.onnx", example_inputs=x)
```

The verbs:

* [plan][ghostify.plan]: decide for every convolution whether and how it is replaced; print it.
* [frontier][ghostify.frontier]: what every budget would cost, from one measurement.
* [apply][ghostify.apply]: carry a plan out on a copy of the model, started from the old weights.
* [convert][ghostify.convert]: plan and apply in one go.
* [distill][ghostify.distill]: train the converted model to answer like the original.
* [compare][ghostify.compare]: parameters, MACs, latency and accuracy of both, as a `Report`.
* [save][ghostify.save], [load][ghostify.load]: an artefact of JSON and safetensors, no pickle.
* [fold][ghostify.fold]: the model as it is deployed, norms and Ghost units folded.
* [export_onnx][ghostify.export_onnx]: an ONNX file that is checked before it appears.
* [load_data][ghostify.load_data], [load_model][ghostify.load_model]: data sets and models by name.

The types: `GhostSpec` (options of one unit), `GhostConv2d` (the unit), `Plan`, `DistillConfig`,
`Backend` (what a latency is planned for), `Run`, `Report`, `LatencyOptions`, `ExportConfig`,
`ExportCheck`, and `GhostifyError`, the root of all errors.
"""

from ghostify.backends.folding import fold
from ghostify.backends.runners import Backend
from ghostify.conversion import apply, convert
from ghostify.deployment import ExportCheck, ExportConfig, export_onnx, load, save
from ghostify.distillation import DistillConfig, Run, distill, load_data
from ghostify.errors import GhostifyError
from ghostify.nn import GhostConv2d
from ghostify.planning import frontier, plan
from ghostify.reporting import LatencyOptions, Report, compare
from ghostify.spec import GhostSpec, Plan
from ghostify.zoo import load_model

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "DistillConfig",
    "ExportCheck",
    "ExportConfig",
    "GhostConv2d",
    "GhostSpec",
    "GhostifyError",
    "LatencyOptions",
    "Plan",
    "Report",
    "Run",
    "apply",
    "compare",
    "convert",
    "distill",
    "export_onnx",
    "fold",
    "frontier",
    "load",
    "load_data",
    "load_model",
    "plan",
    "save",
]
