//! CLIP's vocabulary and its pipeline: how the merges define the tokens, and how text becomes the words they apply to.

use super::files::{Pairs, Special};
use super::{END, START};
use crate::{Error, Result};
use std::io::Read;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{self, Lowercase, NFC, Replace, replace::ReplacePattern};
use tokenizers::pre_tokenizers::{self, byte_level::ByteLevel, split::Split, split::SplitPattern};
use tokenizers::tokenizer::SplitDelimiterBehavior;

/// CLIP's merges in order, one `left right` per line (assets/clip/README.md).
const MERGES: &[u8] = include_bytes!("../assets/clip/merges.txt.gz");

/// The word pattern of Radford et al. 2021 (`simple_tokenizer.py`).
const WORDS: &str = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// CLIP's own vocabulary: the byte characters, the same ending a word, one token per merge, start and end.
pub fn embedded() -> Result<Pairs> {
    let mut text = String::new();
    let broken = |e: std::io::Error| Error::Model(format!("embedded CLIP merges: {e}"));
    flate2::read::GzDecoder::new(MERGES).read_to_string(&mut text).map_err(broken)?;
    let merges: Vec<(String, String)> =
        text.lines().filter_map(|line| line.split_once(' ')).map(|(a, b)| (a.into(), b.into())).collect();
    let bytes = byte_characters();
    let ends = bytes.iter().map(|c| format!("{c}</w>"));
    let tokens = bytes.iter().map(char::to_string).chain(ends).chain(merges.iter().map(|(a, b)| format!("{a}{b}")));
    let vocab = tokens.chain([START.into(), END.into()]).zip(0..).collect();
    Ok(Pairs { vocab, merges })
}

/// One printable character per byte, in the order of the vocabulary: printable Latin-1 first, the rest from U+0100 on.
fn byte_characters() -> Vec<char> {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let plain = (0..=255u8).filter(printable).map(char::from);
    let rest = (0..=255u8).filter(|b| !printable(b)).count();
    plain.chain(('\u{100}'..).take(rest)).collect()
}

/// The pipeline of transformers' `CLIPTokenizer` over a vocabulary.
pub fn pipeline(pairs: Pairs, special: Special) -> tokenizers::Result<tokenizers::Tokenizer> {
    let model = BPE::builder()
        .vocab_and_merges(pairs.vocab.into_iter().collect::<tokenizers::models::bpe::Vocab>(), pairs.merges)
        .unk_token(special.unknown.content.clone())
        .end_of_word_suffix("</w>".into())
        .build()?;
    let mut tokenizer = tokenizers::Tokenizer::new(model);
    let spaces = Replace::new(ReplacePattern::Regex(r"\s+".into()), " ")?;
    tokenizer.with_normalizer(Some(normalizers::Sequence::new(vec![NFC.into(), spaces.into(), Lowercase.into()])))?;
    let words = Split::new(SplitPattern::Regex(WORDS.into()), SplitDelimiterBehavior::Removed, true)?;
    // The byte level splits once more, by GPT-2's pattern; transformers leaves that on.
    let bytes = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(pre_tokenizers::sequence::Sequence::new(vec![words.into(), bytes.into()])));
    tokenizer.add_special_tokens(special.distinct())?;
    Ok(tokenizer)
}
