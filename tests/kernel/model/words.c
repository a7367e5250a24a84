/*
 * Reading the words of a script's line.
 */
#include <linux/errno.h>
#include <linux/kstrtox.h>
#include <linux/limits.h>
#include <linux/string.h>

#include "words.h"

int split(char *line, struct words *words)
{
	char *word;

	memset(words, 0, sizeof(*words));
	while ((word = strsep(&line, " "))) {
		if (!*word)
			continue;
		if (words->count == WORDS_MOST)
			return -EINVAL;
		words->word[words->count++] = word;
	}
	return 0;
}

/* Return the next word, NULL when there is none. */
char *next_word(struct words *words)
{
	while (words->next < words->count) {
		char *word = words->word[words->next++];

		if (word)
			return word;
	}
	return NULL;
}

/* Take a word that stands alone. */
bool take_flag(struct words *words, const char *flag)
{
	for (int i = words->next; i < words->count; i++) {
		if (words->word[i] && !strcmp(words->word[i], flag)) {
			words->word[i] = NULL;
			return true;
		}
	}
	return false;
}

/* Take the value behind a name, NULL when the name is not there. */
char *take(struct words *words, const char *name)
{
	for (int i = words->next; i + 1 < words->count; i++) {
		char *value = words->word[i + 1];

		if (!words->word[i] || !value || strcmp(words->word[i], name))
			continue;
		words->word[i] = NULL;
		words->word[i + 1] = NULL;
		return value;
	}
	return NULL;
}

int take_number(struct words *words, const char *name, u64 most, u64 *number)
{
	char *value = take(words, name);

	if (!value)
		return 0;
	return kstrtou64(value, 10, number) || *number > most ? -EINVAL : 0;
}

/* Let the event of a line happen. Returns 0, or -EINVAL where it cannot be. */
int run_line(char *line)
{
	struct words words;
	char *name;
	int error;

	if (split(line, &words))
		return -EINVAL;
	name = next_word(&words);
	if (!name)
		return 0;
	for (const struct command *command = commands; command->name; command++) {
		if (strcmp(command->name, name))
			continue;
		words.command = command;
		if (command->alone)
			down_write(&model_lock);
		else
			down_read(&model_lock);
		error = command->run(&words);
		if (words.listener) {
			end_line(&words);
			let_go(words.listener, 1);
		}
		if (command->alone)
			up_write(&model_lock);
		else
			up_read(&model_lock);
		return error;
	}
	return -EINVAL;
}
