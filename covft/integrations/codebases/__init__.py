"""Context-aware towers in training codebases, without edits to their files.

Classes and functions are patched by `patches`, methods on the instance are overridden:

    llava          LLaVA, LLaVA-NeXT: `python -m covft.integrations.codebases.llava ... -- their_script ...`
      llava.model.builder.load_pretrained_model            patched while the launcher runs
      transformers.Trainer.__init__                        patched while the launcher runs
      model.save_pretrained of a PeftModel                 overridden when the Trainer is constructed
      model.named_parameters of a PeftModel                overridden after training
      trainer._load_from_checkpoint, ._load_rng_state      overridden on that trainer
      model.prepare_inputs_labels_for_multimodal           overridden by attach()
      model.save_pretrained                                overridden by attach()
      model.get_vision_tower().forward                     overridden by attach(), if torch.no_grad() decorates it
    internvl       internvl_chat: `python -m covft.integrations.codebases.internvl ... -- their_script ...`
      internvl.model.load_model_and_tokenizer              patched while the launcher runs
      transformers.Trainer.__init__, the trainer           as for llava
      model.forward, .generate                             overridden by attach()
      model.extract_feature, .save_pretrained              overridden by attach()
      torch.utils.checkpoint.checkpoint                    patched while model.extract_feature runs
    ms_swift       ms-swift: a plug-in for `--external_plugins`
      swift.tuner_plugin.tuners_map                        gets covft and covft_lora when the plug-in loads
      swift.template.Template.pre_forward_hook             patched when the plug-in loads, until the process ends
      swift.tuners.Swift.merge_and_unload                  as pre_forward_hook
      transformers.Trainer.__init__                        as pre_forward_hook
      trainer._load_from_checkpoint, ._load_rng_state      overridden on that trainer
      the model                                            as for transformers
    llama_factory  LLaMA-Factory: `python -m covft.integrations.codebases.llama_factory ... -- train.yaml`
      llamafactory.train.tuner.run_exp                     called with a `CoVFTCallback`, not patched
      the model                                            as for transformers
    transformers   `covft.attach`, no launcher
      model.forward, .generate                             overridden until `covft.detach`
      model.get_image_features, .get_video_features        overridden until `covft.detach`
      model.save_pretrained                                overridden until `covft.detach`
      model.base_model.forward                             overridden until `covft.detach`
      model.base_model.get_image_features                  overridden while a batch with dummy images is encoded
"""
