"""An adapter's directory, written once for all methods: tensors, settings, what prediction needs (`store`), and the
model card beside them (`card`)."""
