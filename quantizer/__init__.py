"""Offline data-free conversion of FLUX checkpoints to 1.58-bit weights; run it with `python -m quantizer`.

The rooms in their order; each uses itself and those above it:

    files                        what lies on the disk
    model, rounding              FLUX in torch; ternary weights from weights alone
    pictures                     what the original makes: prompts, pictures, states, velocities
    calibration, distillation    ternary weights from activations; from velocities
    pipeline                     all stages, within memory and minutes
    report, comparison           pages that compare files with their original: by its own states; by ComfyUI's pictures
    imports                      ternary weights made elsewhere
    commands                     one module for each subcommand
"""
