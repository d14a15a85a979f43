"""Signatures made by OpenSSL with a key pair that exists nowhere else, over the bytes b"manifest"."""

from __future__ import annotations

from typing import Final

from imgsvc.base.oci import Digest

IMAGE: Final = Digest.of(b"manifest")
PUBLIC_KEY: Final = b"""-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE0a4vwKbtwFFdioVMs53wJCauKkg2
7zLehudM/6V8PowV6TW0P+IfVMTX2WJjNs8Ti/tj0Ov5+jcUNFaP1a2Ifw==
-----END PUBLIC KEY-----
"""
PAYLOAD: Final = (
    b'{"critical":{"identity":{"docker-reference":"registry.example/team/app"},"image":{"docker-manifest-digest":"'
    + IMAGE.encode()
    + b'"},"type":"cosign container image signature"},"optional":null}'
)
PAYLOAD_SIGNATURE: Final = "MEQCIH+/rIruHxCcrcX4e1BgEniHV4hJOEmXWTdXGsVquRIJAiAJVpyOxE31mFAxPwuA9+2NwKfwaIqQ3M8IoxUuayudQA=="
STATEMENT: Final = (
    b'{"_type":"https://in-toto.io/Statement/v1","subject":[{"name":"registry.example/team/app","digest":{"sha256":"'
    + IMAGE.hex.encode()
    + b'"}}],"predicateType":"https://slsa.dev/provenance/v1","predicate":{}}'
)
STATEMENT_SIGNATURE: Final = "MEUCIQCaQDKE3FN4Ts5sT6bRV8mPrIcmrBD8JeVs78Zjxa2+1wIgSt/C/32jBVNPhxMrsR+aKMTqJos9woUwfu3KTpGi31Y="
MANIFEST_SIGNATURE: Final = "MEYCIQDipA7vZk5XqFYL+VqYfowzRI1w5vppZAAs0kc4+LClRgIhAIEnzGojmCiSuarnHT+z4xCign/S/z8QZyKVIPu9FjSC"
