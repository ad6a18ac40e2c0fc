"""The vision service: pictures in, visual embeddings out."""
