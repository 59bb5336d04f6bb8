"""The one op with its rows or its classes spread over ranks: groups, collectives with gradients, folds over what lies elsewhere."""
