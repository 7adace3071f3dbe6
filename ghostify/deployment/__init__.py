"""Storing and loading converted models, and writing them as verified ONNX files."""

from ghostify.deployment.artefact import load, save
from ghostify.deployment.onnx_export import export_onnx
from ghostify.deployment.parity import BatchCheck, ExportCheck

__all__ = ["BatchCheck", "ExportCheck", "export_onnx", "load", "save"]
