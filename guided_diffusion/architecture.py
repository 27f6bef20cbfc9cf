"""Read a network's architecture from the names and shapes of its tensors.

All flags carry the names of `script_util`, except `attention_factors`, the downsampling factors at which there is
attention: they become sides (`attention_resolutions`) once the image size is known, which tensors cannot tell.
"""

# A tensor that every network of a kind has; what precedes it in a name is a wrapper's prefix, like "module.".
ANCHORS = {"ADM": "time_embed.0.weight", "DDPM": "temb.dense.0.weight"}

# What tensors cannot tell, for the published models: (num_channels, num_res_blocks, channel_mult) -> flags.
PUBLISHED = {
    (128, 2, "1,1,2,2,4,4"): dict(image_size=256, num_head_channels=64),
    (128, 1, "1,1,2,2,4,4"): dict(image_size=256, num_head_channels=64),
    (256, 2, "1,1,2,2,4,4"): dict(image_size=256, num_head_channels=64),
    (256, 2, "0.5,1,1,2,2,4,4"): dict(image_size=512, num_head_channels=64),
    (256, 2, "1,1,2,3,4"): dict(image_size=128, num_heads=4, num_head_channels=-1),
    (192, 3, "1,2,3,4"): dict(
        image_size=64, num_head_channels=64, use_new_attention_order=True, noise_schedule="cosine", dropout=0.1
    ),
}


class UnknownArchitecture(Exception):
    """The tensors are those of no known network; the message says what is missing or what was found."""


def unwrap(state):
    """(kind, tensors without the prefixes of wrappers around the network); kind is "ADM", "DDPM" or "ENCODER".

    Averaged weights are taken where a file has both.
    """
    for kind, anchor in ANCHORS.items():
        prefixes = [key[: -len(anchor)] for key in state if key.endswith(anchor) and key[: -len(anchor)][-1:] in ("", ".")]
        if prefixes:
            prefix = min(prefixes, key=lambda p: ("ema" not in p, len(p)))
            state = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
            if kind == "ADM" and not any(key.startswith("output_blocks.") for key in state):
                kind = "ENCODER"
            return kind, state
    # One missing tensor must not make a known network unknown.
    for kind, prefix in (("ADM", "input_blocks.0."), ("DDPM", "conv_in.")):
        if any(prefix in key for key in state):
            raise UnknownArchitecture(f"lacks the tensor {ANCHORS[kind]}, which its architecture needs")
    raise UnknownArchitecture(
        f"is no network that is known here (ADM UNet, its encoder, DDPM UNet): its tensors begin with "
        f"{', '.join(list(state)[:3])}"
    )


def detect(kind, state):
    """The architecture of a network of a kind that `unwrap` found, as a dict of flags.

    Raises UnknownArchitecture where a tensor that tells it is missing.
    """
    try:
        return {"ADM": _adm_flags, "DDPM": _ddpm_flags, "ENCODER": _encoder_flags}[kind](state)
    except KeyError as error:
        raise UnknownArchitecture(f"lacks the tensor {error.args[0]}, which its architecture needs") from None


def _count(state, prefix):
    """One more than the largest number that follows the prefix in a name."""
    numbers = {int(key[len(prefix) :].split(".")[0]) for key in state if key.startswith(prefix)}
    if not numbers:
        raise KeyError(prefix + "0")
    return max(numbers) + 1


def _mult(channels, base):
    return ",".join(f"{c / base:g}" for c in channels)


def _block_width(state, name):
    return state[f"{name}.out_layers.3.weight"].shape[0]


def _adm_flags(state):
    """Architecture of an ADM UNet, with attention given as downsampling factors."""
    base = state["time_embed.0.weight"].shape[1]
    blocks = _count(state, "output_blocks.")
    # The last output block of every level but the finest ends with an upsampling layer, which ends its list.
    ups = [
        i
        for i in range(blocks)
        if any(f"output_blocks.{i}.{j}.{part}.weight" in state for j in (1, 2) for part in ("in_layers.0", "conv"))
    ]
    levels = len(ups) + 1
    per_level = blocks // levels
    factor = 2 ** (levels - 1)
    widths, factors = [], []
    for level in range(levels):
        first = f"output_blocks.{level * per_level}"
        widths.insert(0, _block_width(state, f"{first}.0"))
        if f"{first}.1.qkv.weight" in state:
            factors.insert(0, factor >> level)
    embedding = state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    return dict(
        num_channels=base,
        num_res_blocks=per_level - 1,
        channel_mult=_mult(widths, base),
        attention_factors=tuple(factors),
        learn_sigma=state["out.2.weight"].shape[0] == 2 * state["input_blocks.0.0.weight"].shape[1],
        class_cond="label_emb.weight" in state,
        use_scale_shift_norm=embedding == 2 * _block_width(state, "input_blocks.1.0"),
        resblock_updown=not any(key.endswith(".0.op.weight") for key in state),
        **({"num_classes": state["label_emb.weight"].shape[0]} if "label_emb.weight" in state else {}),
    )


def _ddpm_flags(state):
    """Architecture of a DDPM UNet, in the ADM UNet's flag names."""
    base = state["temb.dense.0.weight"].shape[1]
    levels = _count(state, "down.")
    widths = [state[f"down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
    return dict(
        num_channels=base,
        num_res_blocks=_count(state, "down.0.block."),
        channel_mult=_mult(widths, base),
        attention_factors=tuple(2**i for i in range(levels) if f"down.{i}.attn.0.q.weight" in state),
        learn_sigma=state["conv_out.weight"].shape[0] == 2 * state["conv_in.weight"].shape[1],
        class_cond=False,
    )


def _encoder_flags(state):
    """Architecture of an encoder, in the flag names of the classifier."""
    base = state["time_embed.0.weight"].shape[1]
    head = next((key.split(".")[0] for key in state if key.split(".")[0] in ("out", "I2Iout")), None)
    if head is None:
        raise KeyError("out.0.weight")
    blocks = _count(state, "input_blocks.")
    updown = not any(key.endswith(".0.op.weight") for key in state)
    per_level = _encoder_level_length(state, blocks, updown)
    starts = range(1, blocks, per_level)
    widths = [_block_width(state, f"input_blocks.{i}.0") for i in starts]
    factors = tuple(2**level for level, i in enumerate(starts) if f"input_blocks.{i}.1.qkv.weight" in state)
    flags = dict(
        classifier_width=base,
        classifier_depth=per_level - 1,
        channel_mult=_mult(widths, base),
        attention_factors=factors,
        classifier_use_scale_shift_norm=state["input_blocks.1.0.emb_layers.1.weight"].shape[0]
        == 2 * _block_width(state, "input_blocks.1.0"),
        classifier_resblock_updown=updown,
        head=head,
    )
    if f"{head}.2.positional_embedding" in state:
        side = round((state[f"{head}.2.positional_embedding"].shape[1] - 1) ** 0.5)
        flags |= dict(
            classifier_pool="attention",
            num_class=state[f"{head}.2.c_proj.weight"].shape[0],
            image_size=side * 2 ** (len(widths) - 1),
        )
    elif state[f"{head}.0.weight"].ndim == 1:
        flags |= dict(classifier_pool="adaptive", num_class=state[f"{head}.3.weight"].shape[0])
    elif f"{head}.3.weight" in state:
        flags |= dict(classifier_pool="spatial_v2", num_class=state[f"{head}.3.weight"].shape[0])
    else:
        flags |= dict(classifier_pool="spatial", num_class=state[f"{head}.2.weight"].shape[0])
    return flags


def _encoder_level_length(state, blocks, updown):
    """Input blocks per level, the downsampling one included: block k * length is the k-th downsampling."""
    if not updown:
        return next(i for i in range(1, blocks) if f"input_blocks.{i}.0.op.weight" in state)

    def fits(length):
        for i in range(1, blocks):
            attends = f"input_blocks.{i}.1.qkv.weight" in state
            widens = f"input_blocks.{i}.0.skip_connection.weight" in state
            first = i - i % length + 1
            # Only the first block of a level changes the width; a level attends in all of its blocks or in none, and
            # a downsampling block never does.
            if i % length == 0 and (attends or widens) or i % length > 1 and widens:
                return False
            if i % length and attends != (f"input_blocks.{first}.1.qkv.weight" in state):
                return False
        return True

    # The usual depths first, where several explain the tensors.
    for length in sorted(range(2, blocks + 1), key=lambda n: (abs(n - 3), n)):
        if blocks % length == 0 and fits(length):
            return length
    raise KeyError("input_blocks.1.0.in_layers.0.weight")
