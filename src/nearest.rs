//! Finds the word that was meant.

/// The one of the words that is most like `word`, if any is like it at all.
pub(crate) fn nearest<'a>(word: &str, words: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    words
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .filter(|(distance, candidate)| {
            // Half of the letters of the shorter one may be wrong.
            *distance <= word.chars().count().min(candidate.chars().count()) / 2
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slip_is_seen_and_another_word_is_not_guessed() {
        let words = ["pause", "resume", "report", "restart"];
        assert_eq!(nearest("puase", words), Some("pause"));
        assert_eq!(nearest("reprot", words), Some("report"));
        assert_eq!(nearest("restrat", words), Some("restart"));
        assert_eq!(nearest("xyz", words), None);
        assert_eq!(nearest("", words), None);
    }
}
