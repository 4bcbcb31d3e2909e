"""Which experts exist, and how wide they are: dropping, merging and thinning them before anything is quantized."""
