"""Which models there are, where they lie, and how they are downloaded."""
