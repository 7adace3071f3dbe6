"""Building blocks: the Ghost unit, and the networks of the published tables."""
