"""InternVL-nano: a very small InternVL that this repository trains on pictures that it draws."""
