"""The LLM service: text and visual embeddings in, an answer out."""
