"""Storing and loading converted models, and writing them as verified ONNX files, in float32 or in 8 bits."""

from ghostify.deployment.artefact import load, save
from ghostify.deployment.forms import DeployedForms, Form, FormsConfig, compare_deployed
from ghostify.deployment.onnx_export import ExportConfig, export_onnx
from ghostify.deployment.onnx_notes import OnnxNotes, read_notes
from ghostify.deployment.parity import BatchCheck, ExportCheck
from ghostify.deployment.pruning import pruned
from ghostify.deployment.quantisation import QuantisationCheck, QuantisationConfig, quantise_onnx

__all__ = [
    "BatchCheck",
    "DeployedForms",
    "ExportCheck",
    "ExportConfig",
    "Form",
    "FormsConfig",
    "OnnxNotes",
    "QuantisationCheck",
    "QuantisationConfig",
    "compare_deployed",
    "export_onnx",
    "load",
    "pruned",
    "quantise_onnx",
    "read_notes",
    "save",
]
