"""How ghostify does on the models of torchvision and timm: `python -m benchmarks.coverage`."""
