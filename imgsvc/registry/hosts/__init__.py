"""Who is asked: hosts.toml and what stands in for it.

hosts       one file as data: endpoints, their order and powers
hostdirs    which file speaks of a registry
legacy      containerd's inline tables of mirrors
explain     `hosts explain`
"""
