"""The public interface of the Transfer-Learning-Library's fine-tuning methods, as scripts use it."""

METHODS = {
    "stochnorm": "tllib.normalization.stochnorm",
    "classifier": "tllib.modules.classifier",
    "delta": "tllib.regularization.delta",
    "bss": "tllib.regularization.bss",
    "co_tuning": "tllib.regularization.co_tuning",
    "lwf": "tllib.regularization.lwf",
    "bi_tuning": "tllib.regularization.bi_tuning",
    "knowledge_distillation": "tllib.regularization.knowledge_distillation",
}

# The names that `from ... import *` imports.
STAR_IMPORTED = {
    "stochnorm": "StochNorm1d StochNorm2d convert_model",
    "classifier": "Classifier",
    "delta": "AttentionBehavioralRegularization BehavioralRegularization IntermediateLayerGetter L2Regularization "
    "OrderedDict SPRegularization functools get_attribute nn torch",
    "bss": "BatchSpectralShrinkage",
    "co_tuning": "Classifier CoTuningLoss Relationship",
    "lwf": "Classifier Dict List Optional collect_pretrain_labels nn torch tqdm",
    "bi_tuning": "BiTuning Classifier ClassifierBase nn normalize torch",
    "knowledge_distillation": "F KnowledgeDistillationLoss nn",
}

_CLASSIFIER = "backbone num_classes bottleneck bottleneck_dim head finetune pool_layer"
_STOCH_NORM = "num_features eps momentum affine track_running_stats p"

# The functions and classes with their parameters; a class has those of its constructor.
SIGNATURES = {
    "stochnorm.StochNorm1d": _STOCH_NORM,
    "stochnorm.StochNorm1d.forward": "self input",
    "stochnorm.StochNorm1d.reset_parameters": "self",
    "stochnorm.StochNorm2d": _STOCH_NORM,
    "stochnorm.StochNorm2d.forward": "self input",
    "stochnorm.StochNorm2d.reset_parameters": "self",
    "stochnorm.StochNorm3d": _STOCH_NORM,
    "stochnorm.StochNorm3d.forward": "self input",
    "stochnorm.StochNorm3d.reset_parameters": "self",
    "stochnorm.convert_model": "module p",
    "classifier.Classifier": _CLASSIFIER,
    "classifier.Classifier.forward": "self x return_feat",
    "classifier.Classifier.get_parameters": "self base_lr",
    "classifier.ImageClassifier": _CLASSIFIER,
    "classifier.ImageClassifier.forward": "self x return_feat",
    "classifier.ImageClassifier.get_parameters": "self base_lr",
    "delta.L2Regularization": "model",
    "delta.L2Regularization.forward": "self",
    "delta.SPRegularization": "source_model target_model",
    "delta.SPRegularization.forward": "self",
    "delta.BehavioralRegularization": "",
    "delta.BehavioralRegularization.forward": "self layer_outputs_source layer_outputs_target",
    "delta.AttentionBehavioralRegularization": "channel_attention",
    "delta.AttentionBehavioralRegularization.forward": "self layer_outputs_source layer_outputs_target",
    "delta.IntermediateLayerGetter": "model return_layers keep_output",
    "delta.IntermediateLayerGetter.__call__": "self args kwargs",
    "delta.get_attribute": "obj attr args",
    "bss.BatchSpectralShrinkage": "k",
    "bss.BatchSpectralShrinkage.forward": "self feature",
    "co_tuning.CoTuningLoss": "",
    "co_tuning.CoTuningLoss.forward": "self input target",
    "co_tuning.Relationship": "data_loader classifier device cache",
    "co_tuning.Relationship.__getitem__": "self category",
    "co_tuning.Relationship.collect_labels": "self",
    "co_tuning.Relationship.get_category_relationship": "self source_probabilities target_labels",
    "co_tuning.Classifier": "backbone num_classes head_source kwargs",
    "co_tuning.Classifier.forward": "self x",
    "co_tuning.Classifier.get_parameters": "self base_lr",
    "lwf.Classifier": "backbone num_classes head_source head_target bottleneck bottleneck_dim finetune pool_layer",
    "lwf.Classifier.forward": "self x",
    "lwf.Classifier.get_parameters": "self base_lr",
    "lwf.collect_pretrain_labels": "data_loader classifier device",
    "bi_tuning.Classifier": "backbone num_classes projection_dim finetune pool_layer",
    "bi_tuning.Classifier.forward": "self x",
    "bi_tuning.Classifier.get_parameters": "self base_lr",
    "bi_tuning.BiTuning": "encoder_q encoder_k num_classes K m T",
    "bi_tuning.BiTuning.forward": "self im_q im_k labels",
    "bi_tuning.BiTuning._momentum_update_key_encoder": "self",
    "bi_tuning.BiTuning._dequeue_and_enqueue": "self h z label",
    "knowledge_distillation.KnowledgeDistillationLoss": "T reduction",
    "knowledge_distillation.KnowledgeDistillationLoss.forward": "self y_student y_teacher",
}

_PARTS = "backbone num_classes pool_layer bottleneck _features_dim features_dim finetune"
_LAYER = f"{_STOCH_NORM} weight bias running_mean running_var"

# The attributes of their instances, with parameters, buffers and properties.
ATTRIBUTES = {
    "stochnorm.StochNorm1d": _LAYER,
    "stochnorm.StochNorm2d": _LAYER,
    "stochnorm.StochNorm3d": _LAYER,
    "classifier.Classifier": f"{_PARTS} head",
    "classifier.ImageClassifier": f"{_PARTS} head",
    "delta.L2Regularization": "model",
    "delta.SPRegularization": "target_model source_weight",
    "delta.BehavioralRegularization": "",
    "delta.AttentionBehavioralRegularization": "channel_attention",
    "delta.IntermediateLayerGetter": "_model return_layers keep_output",
    "bss.BatchSpectralShrinkage": "k",
    "co_tuning.CoTuningLoss": "",
    "co_tuning.Relationship": "data_loader classifier device relationship",
    "co_tuning.Classifier": f"{_PARTS} head_source head_target",
    "lwf.Classifier": f"{_PARTS} head_source head_target",
    "bi_tuning.Classifier": f"{_PARTS} head projector projection_dim",
    "bi_tuning.BiTuning": "K m T num_classes encoder_q encoder_k queue_h queue_z queue_ptr",
    "knowledge_distillation.KnowledgeDistillationLoss": "T kl",
}
