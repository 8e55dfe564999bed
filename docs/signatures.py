"""Lets the reference read `shield`'s options, which its code takes as keywords of one kind.

Their names, types and defaults are those of `Options`; what they mean is in `shield`'s docstring.
An extension of griffe, named in `mkdocs.yml`; part of the documentation only, and trusts nothing.
"""

from typing import Any

import griffe


class OptionsInSignature(griffe.Extension):
    """Puts the fields of `Options` in place of `shield`'s ``**options``."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Rewrites the signature once `tempo_jax` is read."""
        if pkg.path != "tempo_jax":
            return
        shield, options = pkg["api.shield.shield"], pkg["api.options.Options"]
        del shield.parameters["options"]
        for name, field in options.attributes.items():
            if "property" not in field.labels:
                # A factory stands in the class as `field(default_factory=Mixing)`.
                made = getattr(field.value, "arguments", [])
                default = f"{made[0].value}()" if made else field.value
                shield.parameters.add(
                    griffe.Parameter(
                        name,
                        annotation=field.annotation,
                        kind=griffe.ParameterKind.keyword_only,
                        default=default,
                    )
                )
