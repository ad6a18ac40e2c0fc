"""The language model: decoder, rotary embedding, paged attention, loader."""
