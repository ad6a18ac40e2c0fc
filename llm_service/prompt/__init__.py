"""From a dialogue to token ids and back: template, tokenizer, splice, text stream."""
