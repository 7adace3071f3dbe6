"""Teaching the converted model to answer like the original one."""
