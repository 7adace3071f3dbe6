"""Reading a plain CNN from an ONNX file: as a torch.fx graph of torch's own layers, checked in onnxruntime."""

from ghostify.deployment.onnx_in.reader import read_model

__all__ = ["read_model"]
