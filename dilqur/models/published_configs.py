"""Shapes of base models on the Hub, for plans that are made before a model is fetched."""

LLAMA_3 = {"model_type": "llama", "vocab_size": 128_256, "num_key_value_heads": 8}
# config.json of the base models on the Hub (meta-llama/Llama-3.2-1B, Llama-3.2-3B, Llama-3.1-8B), as far as sizes go
PUBLISHED = {
    "llama-3.2-1b": {
        **LLAMA_3, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3.2-3b": {
        **LLAMA_3, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24, "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": {
        **LLAMA_3, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128,
        "tie_word_embeddings": False,
    },
}  # fmt: skip
