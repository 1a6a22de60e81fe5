"""The families of the zoo, one file each, registered with timm.

The repository's folder ``backbones`` is the package ``zoo.backbones``. Imported under its bare name it does nothing.
"""

if __name__ == "zoo.backbones":
    from zoo.backbones import inline, lightnet, ravlt, slab, van, vig

    __all__ = ["inline", "lightnet", "ravlt", "slab", "van", "vig"]
