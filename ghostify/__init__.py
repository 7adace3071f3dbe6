"""ghostify turns a trained CNN into a Ghost network."""
