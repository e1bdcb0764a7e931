package main

import (
	"fmt"
	"os"
	"strings"
	"time"
)

// Colours of a terminal.
const (
	bold  = "1"
	red   = "31"
	green = "32"
	cyan  = "36"
)

// readingTime is the pause before a step on a terminal, where a person reads along.
const readingTime = time.Second

// isTerminal reports whether a person reads along at a terminal.
func isTerminal() bool {
	info, err := os.Stdout.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// hasColours reports whether the terminal shows colours, and its user wants them.
func hasColours() bool {
	return isTerminal() && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

func (s *setup) paint(colour, text string) string {
	if !s.options.colours {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// tell begins a step of the story: it says what happens now.
func (s *setup) tell(text string) {
	if s.steps++; s.steps > 1 && s.options.terminal {
		time.Sleep(readingTime)
	}
	fmt.Println(s.paint(bold, fmt.Sprintf("%2d. %s", s.steps, text)))
}

// show prints a piece of evidence, with the verdict in its colour.
func (s *setup) show(text string) {
	for word, colour := range map[string]string{"admitted": green, "starts": green, "refused": red} {
		text = strings.Replace(text, " "+word, " "+s.paint(colour, word), 1)
	}
	fmt.Println("    " + text)
}

// detail prints what is shown only with -v.
func (s *setup) detail(format string, args ...any) {
	if s.options.details {
		fmt.Printf("      "+format+"\n", args...)
	}
}
