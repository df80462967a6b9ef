"""What the models' publishers state: the parts of each `config.json` that say its shape, and its number of parameters.

The numbers are those of the model pages' safetensors metadata, with a tied embedding counted once; of Gemma 3 4B the text part.
"""

_SMOL = {'model_type': 'llama', 'vocab_size': 49152, 'rms_norm_eps': 1e-5, 'rope_theta': 100_000, 'hidden_act': 'silu',
         'tie_word_embeddings': True}
_LLAMA = {'model_type': 'llama', 'vocab_size': 128_256, 'rms_norm_eps': 1e-5, 'rope_theta': 500_000.0, 'hidden_act': 'silu',
          'tie_word_embeddings': True, 'num_key_value_heads': 8, 'intermediate_size': 8192, 'rope_scaling': {
              'factor': 32.0, 'high_freq_factor': 4.0, 'low_freq_factor': 1.0, 'original_max_position_embeddings': 8192,
              'rope_type': 'llama3'}}
_GEMMA_3 = {'model_type': 'gemma3_text', 'head_dim': 256, 'hidden_activation': 'gelu_pytorch_tanh', 'rms_norm_eps': 1e-6,
            'query_pre_attn_scalar': 256, 'rope_theta': 1_000_000, 'rope_local_base_freq': 10_000, 'vocab_size': 262_144,
            'sliding_window': 512, 'sliding_window_pattern': 6, 'num_attention_heads': 4, 'num_key_value_heads': 1}
_QWEN = {'vocab_size': 151_936, 'rms_norm_eps': 1e-6, 'rope_theta': 1_000_000.0, 'hidden_act': 'silu',
         'tie_word_embeddings': True, 'use_sliding_window': False, 'sliding_window': None}
_QWEN_2 = _QWEN | {'model_type': 'qwen2', 'num_key_value_heads': 2, 'sliding_window': 32_768}
_QWEN_3 = _QWEN | {'model_type': 'qwen3', 'num_key_value_heads': 8, 'head_dim': 128, 'attention_bias': False}


def _sizes(hidden: int, inner: int, layers: int, heads: int, **more: int) -> dict[str, int]:
  return {'hidden_size': hidden, 'intermediate_size': inner, 'num_hidden_layers': layers, 'num_attention_heads': heads, **more}


# Name of the gin file -> (parameters, config.json).
PUBLISHED = {
    'smollm2_135m': (134_515_008, _SMOL | _sizes(576, 1536, 30, 9, num_key_value_heads=3)),
    'smollm2_360m': (361_821_120, _SMOL | _sizes(960, 2560, 32, 15, num_key_value_heads=5)),
    'smollm2_1_7b': (1_711_376_384, _SMOL | _sizes(2048, 8192, 24, 32, num_key_value_heads=32, rope_theta=130_000)),
    'llama3_2_1b': (1_235_814_400, _LLAMA | _sizes(2048, 8192, 16, 32, head_dim=64)),
    'llama3_2_3b': (3_212_749_824, _LLAMA | _sizes(3072, 8192, 28, 24, head_dim=128)),
    'gemma3_270m': (268_098_176, _GEMMA_3 | _sizes(640, 2048, 18, 4)),
    'gemma3_1b': (999_885_952, _GEMMA_3 | _sizes(1152, 6912, 26, 4)),
    # Its config.json is about text and pictures, and leaves out what transformers has as defaults.
    'gemma3_4b': (3_880_263_168, {'model_type': 'gemma3', 'text_config': {
        'model_type': 'gemma3_text', 'hidden_size': 2560, 'intermediate_size': 10_240, 'num_hidden_layers': 34,
        'rope_scaling': {'factor': 8.0, 'rope_type': 'linear'}, 'sliding_window': 1024}}),
    'gemma2_2b': (2_614_341_888, {
        'model_type': 'gemma2', 'head_dim': 256, 'hidden_activation': 'gelu_pytorch_tanh', 'hidden_act': 'gelu_pytorch_tanh',
        'rms_norm_eps': 1e-6, 'query_pre_attn_scalar': 256, 'rope_theta': 10_000.0, 'vocab_size': 256_000,
        'sliding_window': 4096, 'attn_logit_softcapping': 50.0, 'final_logit_softcapping': 30.0,
        **_sizes(2304, 9216, 26, 8, num_key_value_heads=4)}),
    'qwen2_5_0_5b': (494_032_768, _QWEN_2 | _sizes(896, 4864, 24, 14)),
    'qwen2_5_1_5b': (1_543_714_304, _QWEN_2 | _sizes(1536, 8960, 28, 12)),
    'qwen3_0_6b': (596_049_920, _QWEN_3 | _sizes(1024, 3072, 28, 16)),
    'qwen3_1_7b': (1_720_574_976, _QWEN_3 | _sizes(2048, 6144, 28, 16)),
    'qwen3_4b': (4_022_468_096, _QWEN_3 | _sizes(2560, 9728, 36, 32))}
