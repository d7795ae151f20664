"""Routing: which tasks an image belongs to, by how well their updates span its class token."""
