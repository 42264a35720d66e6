"""R 2.1: multi-head latent attention and DeepSeekMoE; the whole model against recorded runs."""
