"""Entry point of lmms-eval's plugin mechanism (group `lmms_eval.models`): the model id `sparsevlm`."""


def manifests() -> list:
    """What lmms-eval needs to find our model class. Only a path: lmms-eval calls this whenever it starts."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="sparsevlm", simple_class_path="eval.generate.lmms_model.SparseVLMAdapter")]
