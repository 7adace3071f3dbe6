"""What a model runs on: backends by name, timing of several models side by side, models as ONNX graphs."""
