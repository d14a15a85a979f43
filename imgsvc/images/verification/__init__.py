"""Which images may be used on this node: asked before an image is fetched, and again before a container starts from it.

    policy       the policy file: which repositories need which signatures (pure)
    programs     containerd's image verifiers: programs in a directory, all of which have to agree
    confine      a control group around each of them
    signatures   finding cosign's signatures and attestations, with the credentials of the pull
    service      whether an image may be used, and the verdicts that are remembered

Decisions, and what they cost:

* A verdict is about a digest. A tag that moves to another digest is judged again, and what is fetched afterwards is
  fetched by that digest.
* Verdicts are remembered by digest and policy, positive ones only. So a container starts from a ready image without any
  network; after a change of the policy, a key or a verifier, the first start asks again.
* Programs are asked at every pull, as containerd does, since it is unknown what they look at; their verdict is
  remembered for starting containers only.
* No answer is a refusal: an image whose signature cannot be fetched because its registry is down is refused.

Source: containerd docs/image-verification.md; cosign specs.
"""
