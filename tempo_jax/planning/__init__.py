"""From a traced step to a plan: rewrite, place, cut, describe; and what each choice costs."""
