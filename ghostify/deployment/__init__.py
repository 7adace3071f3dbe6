"""Storing and loading converted models, and writing them as verified ONNX files."""

from ghostify.deployment.artefact import load, save
from ghostify.deployment.onnx_export import ExportConfig, export_onnx
from ghostify.deployment.onnx_notes import OnnxNotes, read_notes
from ghostify.deployment.parity import BatchCheck, ExportCheck

__all__ = [
    "BatchCheck",
    "ExportCheck",
    "ExportConfig",
    "OnnxNotes",
    "export_onnx",
    "load",
    "read_notes",
    "save",
]
