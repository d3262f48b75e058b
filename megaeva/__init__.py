"""megaeva: weak-to-strong training of CLIP models through Megatron-core.

The one legend of tensor shape letters (a suffix on the name: `image_BCHW`, `hidden_SBD`):

    B samples on this rank    G global batch           S sequence (mcore order S, B, D)
    N patches                 M masked patches         K kept patches, or head width beside A
    L text tokens             T frames                 D hidden width
    E joint embedding         A heads                  C channels      H, W pixels
"""

__version__ = "0.1.0"
