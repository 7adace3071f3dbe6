"""Storing a converted model, and exporting it in a form that is checked."""

from ghostify.deployment.artefact import load, save
from ghostify.deployment.onnx_export import export_onnx
from ghostify.deployment.parity import BatchCheck, ExportCheck

__all__ = ["BatchCheck", "ExportCheck", "export_onnx", "load", "save"]
