"""Encrypted layers (OCI image encryption, as ocicrypt writes it): find the layer key, run the cipher, or hand both to a processor.

One screen map::

    interfaces    LayerKey, StreamTransform, KeyWrapper, ChainRun, Decryptor: what the use cases see
    packets       pure: media types, annotations, options documents
    jwe pkcs7 pgp one key wrapping scheme each, on primitives of `cryptography`; pgp_packets reads OpenPGP framing and keys
    pkcs11        a token's key: policy and child; pkcs11_child talks to the module, in its own process
    keyprovider   a program or gRPC service that unwraps
    keys keydir   bytes of a key file -> keys; the directory of key files, re-read when it changes
    unwrap        every item of every scheme against every key; the error that says what is missing
    aesctr        AES-256-CTR + HMAC-SHA256 as a stream, run inside the unpack worker
    processors    pure: containerd's [stream_processors] table, chains and their validation;  payload: what they get on fd 3
    external      runs such a chain;  children: bounded runs of helper programs
    authorise     fingerprints and remembered verdicts: whether a caller may use an unpacked image
    decryptor     LayerDecryptor, all of it behind the Decryptor protocol
    ctd_decoder   the same as a program with containerd's stream processor contract

Decisions. Trial decryption, not key IDs, finds the key, because writers leave key IDs out; recipients named in packets
serve error texts only. Key material never enters an error, a log line or an argument list. A wrapped key authenticates
no sender (anyone can wrap to a public key), so the layer's diff ID stays the last word on the plaintext.

Whether a stream processor can open a layer is known only when it runs. Authorisation to use its layers is therefore bound to the files its
program, arguments and environment name: when one of them changes, the layer is decrypted again.

Downside: JWE compact form and `zip`, DES in PKCS7 and ElGamal in OpenPGP are refused; no known writer of images makes them.
"""
