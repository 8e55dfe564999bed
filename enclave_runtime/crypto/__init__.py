"""Authenticated encryption, key derivation and key streams; all from `cryptography`."""
