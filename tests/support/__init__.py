"""What tests share: images made from scratch, real registries, the real daemon, a CRI client, a leak check."""
