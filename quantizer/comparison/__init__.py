"""Pictures of a ternary model beside its original's, painted in ComfyUI, and what can be said of them."""
