"""model_export: a `TowerModel` as a file: its towers, or the plain model."""

from typing import Any

from towers.foreign.doors import opened
from towers.placement.placement import Placement


def export_model(
    model: Any,
    filepath: str,
    format: str,
    verbose: bool | None,
    input_signature: Any,
    placement: Any,
    **kwargs: Any,
) -> None:
    """As `TowerModel.export`, of that model."""
    if format != "tf_saved_model":
        if isinstance(placement, Placement):
            raise ValueError(
                f"A file of format {format!r} can hold no `placement`. "
                'Expected format="tf_saved_model"; or leave it out.'
            )
        model.template.export(
            filepath,
            format=format,
            verbose=verbose,
            input_signature=input_signature,
            **kwargs,
        )
        return
    if kwargs:
        of_jax = set(kwargs) <= {"is_static", "jax2tf_kwargs"}
        raise (ValueError if of_jax else TypeError)(  # as Keras has it
            f"export does not take {', '.join(kwargs)} with format "
            '"tf_saved_model" of TensorFlow. Leave that out.'
        )
    with opened("TowerModel.export"):
        from towers.export import export_towers
    if placement == "own":
        placement = model.placement
    export_towers(
        model.template,
        filepath,
        placement,
        input_signature,
        model.merge,
        whole=model.whole,
        synchronized=model.synchronized,
    )
    if verbose:
        print(f"Saved towers at {filepath!r}: {placement}")
