"""What is computed: texts, losses, training, mining, metrics. Arrays in, arrays out; no engine."""
