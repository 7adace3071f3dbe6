"""Facts about a model's convolutions: where they are called, with which shapes, and what follows them."""
