"""Pure tensor functions of the methods: batched, mask-aware, without transformers. Each names its source."""
