"""Bodies that several families share: DeiT, PVT, Swin and CSwin, with the token mixer and the norm as parameters."""
