"""What tests and demonstrations run instead of the real thing, and models for them."""
