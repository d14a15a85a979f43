"""The mirror endpoint: the local store as a read-only registry.

server     requests and answers
cache      pull-through: what is not stored is fetched from its registry
"""
