"""Which experts exist: dropping and merging them before anything is quantized."""
