"""gRPC services of the image side: protobuf in, use cases, protobuf out.

    cri_images     CRI ImageService v1
    admin          pulls with progress, inspection, store upkeep: what CRI has no call for
    image_tools    archives, pre-pulls, events, mounts

CRI RuntimeService is runtime/service.py.
"""
