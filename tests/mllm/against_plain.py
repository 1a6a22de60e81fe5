"""The plain model run once over prompt and answer, with what an accelerated one leaves out taken away: slow, clear."""

import math

import torch
import transformers

from zoo.mllm import YOPO, masks
from zoo.mllm.layout import TokenLayout

MARKER, IMAGE = 94, 90
GREEDY = {"do_sample": False, "eos_token_id": None, "suppress_tokens": [IMAGE]}
WHOLE = YOPO()  # leaves nothing out
GRIDS = {
    "llava": (4, 4),
    "qwen2_vl": (3, 4),
    "qwen2_5_vl": (3, 4),
    "internvl": (2, 2),
    "smolvlm": (2, 2),
    "idefics3": (2, 2),
}


@torch.no_grad()
def logits(model, inputs):
    return model(**inputs).logits


def generated(model, inputs, count=3, **options):
    """Ids of prompt and answer, the logits (B, count, V) of the answer, and the cache."""
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True, **options}
    out = model.generate(**inputs, max_new_tokens=count, **options)
    return out.sequences, torch.stack(out.logits, 1), out.past_key_values


def continued(inputs, sequences):
    """The inputs with the generated tokens behind the prompt."""
    new = sequences.shape[1] - inputs["input_ids"].shape[1]
    longer = dict(inputs, input_ids=sequences)
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            more = torch.full((len(sequences), new), fill)
            longer[name] = torch.cat([inputs[name], more], 1)
    return longer


def seen_by_layers(handle):
    """(layers, B, L) bool: which tokens of the prompt each layer sees."""
    prefill = handle.last
    seen = []
    for layer in range(len(handle._decoder.layers)):
        mask = torch.zeros_like(prefill.layout.valid)
        kept = prefill.cached.get(layer)
        for row in range(len(mask)):
            places = torch.arange(mask.shape[1])
            if prefill.before is not None:
                places = prefill.before.index[row]
            chosen = torch.ones_like(places, dtype=torch.bool)
            if prefill.before is not None:
                chosen = prefill.before.valid[row]
            if kept is not None:
                places, chosen = places[kept.index[row]], kept.valid[row]
            mask[row, places[chosen]] = True
        seen.append(mask)
    return torch.stack(seen)


def merged_by_layers(handle):
    """For each layer before which tokens are merged: (B, L, L), row i the weights of what prompt token i becomes."""
    prefill, found = handle.last, {}
    batch, length = prefill.layout.valid.shape
    for number, cuts in prefill.cuts.items():
        places, valid = torch.arange(length).expand(batch, -1), torch.ones(batch, length, dtype=torch.bool)
        for kept in (prefill.before, prefill.kept.get(number - 1)) if number else ():
            if kept is not None:
                places, valid = places.gather(1, kept.index), valid.gather(1, kept.index) & kept.valid
        for cut in cuts:
            if cut.merged is not None:
                whole = torch.eye(length).repeat(batch, 1, 1)
                for row in range(batch):
                    inside, changed = valid[row].nonzero()[:, 0], cut.merged.valid[row]
                    at = places[row, cut.merged.index[row, changed]]
                    whole[row, at[:, None], places[row, inside]] = cut.weights[row, changed][:, inside]
                found[number] = whole @ found[number] if number in found else whole
            places, valid = places.gather(1, cut.kept.index), valid.gather(1, cut.kept.index) & cut.kept.valid
    return found


def masked(model, inputs, seen, rule="causal", routing=None, plan=WHOLE, merged=None, zipped=None):
    """Logits of the plain model over prompt and answer, with what is left out masked.

    Args:
        model: not accelerated.
        inputs: of prompt and answer.
        seen: (layers, B, L of the prompt) bool, of ``seen_by_layers``.
        rule: name of a mask.
        routing: a MoD and the layers that route: there, tokens that are not seen stay as they are.
        plan: of YOPO.
        merged: of ``merged_by_layers``.
        zipped: a ZipVL without random probes.
    """
    layout = TokenLayout.from_ids(inputs["input_ids"], [IMAGE], inputs["attention_mask"], [MARKER])
    image, (batch, length), prompt = layout.is_image, layout.valid.shape, seen.shape[2]
    allowed = masks.RULES[rule](layout)
    windowed = masks.neighbour(layout, GRIDS[model.config.model_type], plan.window // 2) if plan.window else allowed
    itself = torch.eye(length, dtype=torch.bool)

    def attention(module, query, key, value, attention_mask, scaling, **kwargs):
        number = module.layer_idx
        within = number < (plan.layer or len(seen))
        keys = torch.cat([seen[number], seen.new_ones(batch, length - prompt)], 1)
        may = (windowed if within else allowed) & keys[:, None]
        gone = torch.zeros(query.shape[1], dtype=torch.bool)
        gone[list(plan.pruned[number]) if within and plan.pruned else []] = True
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        if zipped:
            return sparse(query, key, value, may, layout.valid[:, :prompt] & seen[number], scaling, zipped), None
        to_image = gone[:, None, None] & image[:, None, None, :]
        scores = (scaling * query @ key.transpose(-1, -2)).masked_fill(~(may | itself)[:, None], -torch.inf)
        if plan.renorm:
            scores = scores.masked_fill(to_image & ~itself, -torch.inf)
        out = scores.softmax(-1).masked_fill(to_image, 0.0) @ value
        return out.masked_fill(gone[:, None, None] & image[:, None, :, None], 0.0).transpose(1, 2), None

    def fewer_neurons(module, args, output):
        inner = module.act_fn(module.gate_proj(args[0])) * module.up_proj(args[0])
        inner[..., inner.shape[-1] // plan.ffn_ratio :] = 0
        return torch.where(image[..., None], module.down_proj(inner), output)

    def merging(mix):
        def before(module, args):
            hidden = args[0].clone()
            hidden[:, :prompt] = mix @ hidden[:, :prompt]
            return (hidden, *args[1:])

        return before

    if not model.config.model_type.startswith("qwen"):  # as generate has them: few bits tell rotated keys apart
        inputs = {**inputs, "position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}
    decoder = model.get_decoder()
    transformers.AttentionInterface.register("masked", attention)
    transformers.AttentionMaskInterface.register("masked", transformers.masking_utils.sdpa_mask)
    decoder.set_attn_implementation("masked")
    handles = [decoder.layers[number].register_forward_pre_hook(merging(mix)) for number, mix in (merged or {}).items()]
    if plan.ffn_ratio > 1:
        handles += [layer.mlp.register_forward_hook(fewer_neurons) for layer in decoder.layers]
    for number in routing[1] if routing else ():
        handles += routed_layer(decoder.layers[number], routing[0], seen[number], layout.valid, decoder.rotary_emb)
    try:
        return logits(model, inputs)
    finally:
        decoder.set_attn_implementation("sdpa")
        for handle in handles:
            handle.remove()


def routed_layer(layer, depth, seen, valid, rotary):
    gate = []

    def enter(module, args, kwargs):
        gate[:] = [depth.router(module.input_layernorm(args[0])).softmax(-1)[..., 1:]]
        if depth.positions == "compact":
            positions = (processed() & valid).cumsum(1) - 1
            kwargs = {**kwargs, "position_embeddings": rotary(args[0], position_ids=positions.clamp(min=0))}
        return args, kwargs

    def processed():
        return torch.cat([seen, seen.new_ones(len(seen), valid.shape[1] - seen.shape[1])], 1)

    def leave(module, args, output):
        return torch.where(processed()[..., None], output, args[0])

    return [
        layer.register_forward_pre_hook(enter, with_kwargs=True),
        layer.mlp.register_forward_hook(lambda module, args, output: output * gate[0] if depth.gate else None),
        layer.register_forward_hook(leave),
    ]


def sparse(query, key, value, may, valid, scaling, zipped):
    """ZipVL's attention (B, L, heads, D), row by row, of queries, keys and values of equal heads (B, heads, L, D)."""
    prompt, out = valid.shape[1], torch.zeros_like(query)
    chosen = [
        important(
            scaling * query[row, :, :prompt] @ key[row, :, :prompt].mT, may[row, :prompt, :prompt], inside, zipped
        )
        for row, inside in enumerate(valid)
    ]
    finely = max(map(len, chosen))  # a batch is rectangular
    for row, best in enumerate(chosen):
        inside = valid[row].nonzero()[:, 0].tolist()
        others = [place for place in reversed(inside) if place not in best]
        fine, coarse = best + others[: finely - len(best)], others[finely - len(best) :]
        keys, values = key[row].clone(), value[row].clone()
        if zipped.low in (0, 16):
            fine = best
        for x in (keys, values):
            for places, bits in ((fine, zipped.high), (coarse, zipped.low)):
                x[:, places] = torch.stack([coarsely(head[places], bits) for head in x])
        here = torch.zeros(may.shape[1], dtype=torch.bool)
        here[best] = True
        later = torch.arange(len(here)) >= prompt
        first = may[row] & here & here[:, None]
        scores = (scaling * query[row] @ key[row].mT).masked_fill(~first, -torch.inf)
        out[row] = (scores.softmax(-1).nan_to_num() @ value[row]).masked_fill(~here[:, None], 0.0)
        last = may[row] & (here | later if zipped.low == 0 else torch.ones_like(here))
        scores = (scaling * query[row] @ keys.mT).masked_fill(~last, -torch.inf)
        out[row, :, later] = (scores.softmax(-1).nan_to_num() @ values)[:, later]
    return out.transpose(1, 2)


def important(scores, may, valid, zipped):
    """Places of the important tokens, by the rule written out: scores (heads, L, L), may (L, L), valid (L,)."""
    places = valid.nonzero()[:, 0].tolist()
    if zipped.tau == 1:
        return places
    probes = places[-zipped.recent :]
    shares = scores.masked_fill(~(may & valid), -torch.inf).softmax(-1).mean(0)
    mass = {place: sum(float(shares[probe, place]) for probe in probes) for place in places}
    needed = reached = 0
    for one in sorted(mass.values(), reverse=True):
        needed, reached = needed + 1, reached + one
        if reached >= zipped.tau * len(probes):
            break
    worth = {place: mass[place] / max(1, sum(bool(may[probe, place]) for probe in probes)) for place in places}
    return sorted(sorted(places, key=lambda place: -worth[place])[:needed])


def coarsely(x, bits):
    """Numbers (S, D) as they are read from so many bits: channels made even, then levels for each token."""
    if bits in (0, 16) or not len(x):
        return x
    out = torch.empty_like(x)
    root = [math.sqrt(float(x[:, channel].abs().max())) or 1.0 for channel in range(x.shape[1])]
    for token, numbers in enumerate(x.float()):
        even = numbers / torch.tensor(root)
        low, high = float(even.min()), float(even.max())
        step = (high - low) / (2**bits - 1) or 1.0
        out[token] = (low + step * ((even - low) / step).round()) * torch.tensor(root)
    return out
