"""Storing a converted model without pickle, and exporting it to verified ONNX."""
